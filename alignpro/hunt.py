from alignpro.moved import moved

__getattr__ = moved(__name__, tables="alignpro.commands.hunt")
