"""LLaMA-Factory imports torchvision and torchaudio even where it uses neither. On a machine whose torch is a CPU build
without matching ones, this lets the imports pass: the names of torchvision's operators are declared, none is ever called.
Where both import as they should, it does nothing."""
import re, sys, types
from importlib.machinery import ModuleSpec

DECLARED = []


def import_torchvision(tries=40):
    "Import torchvision; declare an operator that its compiled half would have brought, and try again"
    import torch
    for _ in range(tries):
        try: return __import__('torchvision')
        except RuntimeError as error:
            missing = re.search(r'operator torchvision::(\w+) does not exist', str(error))
            if not missing: raise
            library = torch.library.Library('torchvision', 'FRAGMENT')
            library.define(f'{missing[1]}(Tensor x) -> Tensor')
            DECLARED.append(library)
            for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']: del sys.modules[name]


def import_torchaudio():
    "Import torchaudio, or put an empty module in its place"
    try: import torchaudio # noqa
    except (ImportError, OSError):
        empty = sys.modules['torchaudio'] = types.ModuleType('torchaudio')
        empty.__spec__ = ModuleSpec('torchaudio', None)


import_torchvision()
import_torchaudio()
