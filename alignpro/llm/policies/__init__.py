"""Policies made of language models: prompters, and exact policies on prefix trees."""
