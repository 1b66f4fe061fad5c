from alignpro.commands.main import main
from alignpro.moved import moved

__getattr__ = moved(__name__, "alignpro.commands.main")
if __name__ == "__main__":
    raise SystemExit(main())
