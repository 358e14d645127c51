"""Tables from records: best configurations, gaps, times to targets, health, minima."""
