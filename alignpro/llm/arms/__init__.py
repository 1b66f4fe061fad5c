"""Experiments with a prompter, a frozen model and a reward: roll out, resample, judge, enumerate."""
