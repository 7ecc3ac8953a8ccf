"""LLaMA-Factory imports torchvision and torchaudio even where it uses neither. On a machine whose torch is a CPU build
without matching ones, this lets the imports pass: the names of torchvision's operators are declared, none is ever called.
`vlm doctor --install llamafactory` puts it into the environment it makes; where both import as they should, it does nothing."""
import re, sys
from importlib.machinery import ModuleSpec, PathFinder

DECLARED = []


def declare(error):
    "Declare the operator that an import missed; any other error goes on its way"
    import torch
    missing = re.search(r'operator torchvision::(\w+) does not exist', str(error))
    if not missing: raise error
    library = torch.library.Library('torchvision', 'FRAGMENT')
    library.define(f'{missing[1]}(Tensor x) -> Tensor')
    DECLARED.append(library)
    for name in [name for name in sys.modules if name.startswith('torchvision.')]: del sys.modules[name]


class Patient:
    "A loader that tries again after each operator it had to declare"
    def __init__(self, real, tries=40): self.real, self.tries = real, tries

    def __getattr__(self, name): return getattr(self.real, name)

    def exec_module(self, module):
        for _ in range(self.tries):
            try: return self.real.exec_module(module)
            except RuntimeError as error: declare(error)


class Empty:
    "A loader of a module with nothing in it"
    def create_module(self, spec): return None
    def exec_module(self, module): pass


class Finder:
    "Stands before Python's own finders and answers for two packages"
    def find_spec(self, name, path=None, target=None):
        if name not in ('torchvision', 'torchaudio'): return None
        found = PathFinder.find_spec(name, path)
        if name == 'torchaudio': return found or ModuleSpec(name, Empty())
        if found: found.loader = Patient(found.loader)
        return found


if not any(type(finder).__name__ == 'Finder' for finder in sys.meta_path): sys.meta_path.insert(0, Finder())
