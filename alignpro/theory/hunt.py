from alignpro.moved import moved

__getattr__ = moved(
    __name__, "alignpro.theory.search.found", "alignpro.theory.search.ascend", "alignpro.theory.search.shrink"
)
