"""Packaging of lus_fastai, from settings.ini: what pyproject.toml leaves to be filled in. `data/` and
`results/` ship inside the wheel as `lus_fastai/_data` and `_results`."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(here / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
stages = {
    '1': 'Planning',
    '2': 'Pre-Alpha',
    '3': 'Alpha',
    '4': 'Beta',
    '5': 'Production/Stable',
    '6': 'Mature',
    '7': 'Inactive',
}
parts = ('widgets', 'imagenet', 'dicom', 'distributed', 'onnx', 'docs')
extras = {k: cfg[f'{k}_requirements'].split() for k in (*parts, 'dev')}
extras['dev'] += [r for k in parts for r in extras[k]]

setup(
    version=cfg['version'],
    keywords=cfg['keywords'],
    license=cfg['license'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    classifiers=[
        f"Development Status :: {cfg['status']} - {stages[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Medical Science Apps.',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    packages=find_packages(include=['lus_fastai', 'lus_fastai.*'])
    + ['lus_fastai._data', 'lus_fastai._results'],
    package_dir={'lus_fastai._data': 'data', 'lus_fastai._results': 'results'},
    package_data={'lus_fastai._data': ['**/*'], 'lus_fastai._results': ['*.json']},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': ['lus_fastai=lus_fastai._modidx:d'],
    },
    zip_safe=False,
)
