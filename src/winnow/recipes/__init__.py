"""ONE FILE = ONE EXPERIMENT; its docstring states cost, expected result and command."""
