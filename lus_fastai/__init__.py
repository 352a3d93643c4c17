__version__ = "0.2.0"

import sys
import warnings
warnings.filterwarnings('ignore', '.*torch.jit.script. is deprecated', FutureWarning)   # raised by importing fastai; nothing a user can do about it

def __getattr__(name):
    "Import on demand (PEP 562): a module of ours when it is named, `lus_fastai.all` for any other name and for `import *`."
    from importlib import import_module
    from importlib.util import find_spec
    if name.startswith('_') and name != '__all__': raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if name != '__all__' and find_spec(f'{__name__}.{name}'): return import_module(f'{__name__}.{name}')
    every = import_module(f'{__name__}.all')
    if name == '__all__':
        globals().update({k: getattr(every, k) for k in every.__all__})  # so that `import *` does not come back here for each name
        return every.__all__
    if name not in every.__all__: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(every, name)

if 'ipykernel' in sys.modules:  # a notebook: its figures get the style of the package
    from lus_fastai.plot import style_notebook
    style_notebook()
