"""What a person types and sees: commands, sessions, progress. It alone reaches for `lbstudy.analysis`."""
