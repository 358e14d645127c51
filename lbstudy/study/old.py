"""What studies that older versions began do not say, and versions since then write into a study's folder."""

LABELS = {
    "sgd": "SGD", "kfac": "K-FAC", "lars": "LARS", "adamw": "AdamW", "mixup": "Mixup", "noise": "parameter noise",
}  # fmt: skip
"""What version 0.1 called its methods in sentences and figures."""
