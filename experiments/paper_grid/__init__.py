"""The paper's experiments as a grid of cells: what each is (`plan`), what it costs (`cost`), who does it
(`work`), what came out (`summary`), and how that looks (`figures`). The entry point: `experiments/paper.py`.
"""
