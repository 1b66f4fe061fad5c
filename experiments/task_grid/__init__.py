"""Five tasks for a prompter, from what is foreseen to what is earned: the jobs (`plan`), what came out
(`results`) and how that reads (`page`). The entry point: `experiments/tasks.py`.
"""
