"""alignpro: verify, and then exploit, the theory of prompt optimization for LLM alignment."""

__version__ = "0.1.0"
