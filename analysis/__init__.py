"""From a study's records to evidence: tables, figures, minima, the report. Imported as `lbstudy.analysis`."""
