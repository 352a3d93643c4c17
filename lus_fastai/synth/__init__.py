"What can be simulated when data cannot be had: ultrasound clips, shapes, radiographs."
