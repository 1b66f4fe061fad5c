from alignpro.moved import moved

__getattr__ = moved(__name__, "alignpro.theory.proof.certify", "alignpro.theory.proof.balls")
