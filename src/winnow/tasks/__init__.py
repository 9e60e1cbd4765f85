"""One file is one task: what a model is asked to do, and how the answer is scored."""
