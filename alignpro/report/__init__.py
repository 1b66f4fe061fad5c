"""How results look: numbers, pages, figures."""
