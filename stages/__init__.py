"""The program: one module per stage of the experiment, in the order of dvc.yaml, and the libraries they share."""
