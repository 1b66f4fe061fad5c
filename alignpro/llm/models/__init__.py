"""Language models: fetched, loaded, checked, read, sampled."""

from alignpro.moved import moved

__getattr__ = moved(__name__, load_model="alignpro.llm.models.load")
