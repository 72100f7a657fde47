"""Hooks of PyTorch modules."""

from torch.nn.modules import module as modules

# Attributes with the hooks around ``forward``, of a module and of all modules. PyTorch has no
# public function to list them.
HOOKS = tuple(
    (f"_{name}_hooks", f"_global_{name}_hooks")
    for name in ("forward", "forward_pre", "backward", "backward_pre")
)


def is_hooked(module) -> bool:
    """Whether a module has hooks; also true if PyTorch stores hooks under other names."""
    for name, global_name in HOOKS:  # a loop: it runs in every call
        if getattr(module, name, True) or getattr(modules, global_name, True):
            return True
    return False
