from alignpro.moved import moved

__getattr__ = moved(__name__, "alignpro.llm.policies.prompter")
