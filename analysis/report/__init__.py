"""The page: the answer, a verdict for each claim, the evidence, what is missing."""
