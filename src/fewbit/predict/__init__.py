"""What a step would cost elsewhere: hardware as data, the model of one step, calibration from measured points."""
