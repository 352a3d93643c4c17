"From a file on disk to a batch."
