"How networks learn: losses, cross-validation, masks, contrast, semi-supervision, detection."
