"Scores with intervals over patients: classification, segmentation, calibration."
