"""Ask, train as cohorts, report, prune, tell: the loop of a study."""
