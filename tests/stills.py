"Still images on disk, as rows of a clip table."

import numpy as np
from PIL import Image


def write_still(path, image, label, patient, mask=None):
    "Write a grey image and, if it is given, its mask beside it; the row of a clip table."
    Image.fromarray(image).save(path)
    row = dict(path=str(path), kind='image', label=label, patient=patient, source='made', probe='convex')
    if mask is None:
        return row
    file = path.with_name(f'{path.stem}_mask.png')
    Image.fromarray(np.full_like(image, mask)).save(file)
    return row | dict(mask=str(file))
