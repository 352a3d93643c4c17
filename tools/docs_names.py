"""Titles for what files of results name in short: protocols, tables, data, rows and scores."""

import re

PAGES = {  # a page whose title is not the paper of its first file
    'splits': 'What a split is worth'
}
DATA = {'pocus': 'POCUS', 'phantom': 'the phantom', 'real': 'real images'}
RUNS = {'pocus_model-pocus-ideas': 'ideas that were tried'}  # what is special about a file
PROTOCOLS = {  # paper's module -> protocol -> title
    'arora': {
        'patient': 'Folds by patient',
        'file': 'Folds by file name, as in the paper',
        'external': 'Patients who are in no fold',
        'fan crop': 'Folds by patient, frames cut down to the fan',
        'source': 'Where does a frame come from?',
        'healthy against diseased': 'Two classes: healthy or diseased',
        'COVID-19 against pneumonia': 'Two classes: COVID-19 or pneumonia',
    },
    'cheng_lam': {
        'test': 'Test on new patients',
        'first': 'The first step: outlines of salient shapes',
        'patient': 'Folds by patient',
        'image': 'Folds by image, as the authors split',
    },
    'gare': {
        'segmentation by patient': 'Segmentation, folds by patient',
        'classification by patient': 'Classification, folds by patient',
        'classification by frame': 'Classification, folds by frame',
    },
    'merand': {
        'chain': 'From boxes to masks, on patients divided once',
        'folds': 'Patient folds over all images',
        'first': 'The first step: labels or images',
        'rotation': "The authors' rotation of the watched images",
        'last': "The authors' rotation, last epoch",
    },
    'pocus_model': {
        'patient': 'Folds by patient',
        'source': 'Test on a source that was not seen',
        'BLUES': 'Folds by patient on COVID-BLUES',
    },
    'sim_to_real': {
        'test': 'Patients kept for the test',
        'tuning': 'Patients seen while the simulation was adapted',
        'TransBound': 'Ten frames of TransBound',
    },
    'small_model': {'patient': 'Folds by patient', 'source': 'Test on a source that was not seen'},
    'splits': {
        'POCOVID-Net': 'The rule of Born et al. 2020 (POCOVID-Net)',
        'Gare': 'The rule of Gare et al. 2021: clips',
        'Gare, variants': 'The rule of Gare et al. 2021: variants of a frame',
        'Cheng & Lam': 'The rule of Cheng & Lam 2021',
        'USCL': 'The rule of Chen et al. 2021 (USCL)',
        'Merand & Klein': 'The rule of Merand & Klein 2021',
        'EchoLung': 'The rule of EchoLung',
        'frames': "No paper's rule: frames at random",
    },
    'uscl': {
        'last': 'Fine-tuning, last epoch',
        'best': 'Fine-tuning, best epoch on the test fold',
        'probe': 'Linear probe',
        'last 3': 'Fine-tuning of three layers, last epoch',
        'last 3, best': 'Fine-tuning of three layers, best epoch on the test fold',
        'all': 'Fine-tuning of all layers, last epoch',
        'all, best': 'Fine-tuning of all layers, best epoch on the test fold',
        'detection': 'Detection with Mask R-CNN',
    },
}
TABLES = {  # whose name in the file says too little
    'a_lines': 'A-lines',
    'area by severity': 'area of the predicted lines by severity',
    'attention': 'share of the heat inside the fan, beside the share of the area',
    'b_lines': 'B-lines',
    'budgets': 'accuracy by the number of labelled clips',
    'chain': 'masks',
    'classes': 'IoU of each class',
    'comparison': 'scores',
    'conflict': 'similarity of two frames (cosine of their features)',
    'copies': 'share of test images whose mirrored copy is in training',
    'curve': 'accuracy by the steps of pretraining',
    'dense codes': 'each of the seven dense codes',
    'detection': 'average precision',
    'difference to the phantom before': 'difference to an earlier version of the phantom',
    'external': 'COVID-19 against the rest, by patient',
    'folds: mean and deviation': 'folds of the first seed: mean and deviation',
    'fixed 80': "the paper's headline: soft Dice on 80 fixed images",
    'labels': 'a part of the labels',
    'look-up': 'no network: the label of the most similar training frame',
    'loss': 'loss of the watched and of the test images',
    'order': 'share of images for which Dice and this score prefer different masks',
    'refused': 'share that the model refuses to answer for',
    'sets': 'sets of diagnoses: how often they hold the truth, their mean size, how often they are single',
    'shortcuts': 'what a network predicts from which part of the frame',
    'signs': 'signs, each a question of its own',
    'TransBound': 'lines found on real frames',
    'worth': 'accuracy, and what the rule adds to it',
}
_WORDS = {
    r'^a_lines$': 'A-lines',
    r'^b_lines$': 'B-lines',
    r'^pleural_irregularities$': 'irregular pleura',
    r'\bf1\b': 'F1',
    r'\biou\b': 'IoU',
    r'\bdice\b': 'Dice',
    r'^hd95$': 'HD95',
}


def protocol_title(
    paper: str,  # its module
    name: str,  # of the protocol, as in a file of results
) -> str:
    "What a reader is told instead of the short name; the name where there is nothing better."
    return PROTOCOLS.get(paper, {}).get(name, name)


def shown_name(
    name: str,  # of a row or a score, as in a file of results
) -> str:
    "The field's spelling of a name."
    for pattern, text in _WORDS.items():
        name = re.sub(pattern, text, name)
    return name
