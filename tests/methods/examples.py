"""Numbers that tests train with, for methods to be tested without being named."""

from lbstudy.methods import configure

LEARNING_RATES = {"sgd": 0.05, "lars": 3, "adamw": 3e-3, "kfac": 3e-3, "lamb": 0.01, "muon": 0.01}

NUMBERS = {
    "weight_decay": 1e-3,
    "mixup_alpha": 0.5,
    "cutmix_alpha": 1.0,
    "noise_magnitude": 0.01,
    "label_smoothing": 0.1,
    "sam_radius": 0.05,
    "ema_decay": 0.8,
}
"""Every number that must be given has its example here; others may."""


def hyper(optimizer: str, smoothing: str) -> dict[str, float]:
    """Numbers of a run with these methods.

    Raises:
        KeyError: a number that must be given has no example; the message says where to put one.
    """
    known = configure.numbers_of(optimizer, smoothing)
    examples = NUMBERS | {"learning_rate": LEARNING_RATES.get(optimizer, 0.01)}
    for name, field in known.items():
        if field.is_required() and name not in examples:
            raise KeyError(f"{optimizer} with {smoothing} needs `{name}`: put an example into NUMBERS of {__file__}")
    return {name: value for name, value in examples.items() if name in known}
