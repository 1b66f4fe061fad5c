"""Searching instances: claims checked at random, hunted for the worst case, looked at one by one."""
