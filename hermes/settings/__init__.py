"""What params.yaml may say: one module a section, light to import, so that a whole profile is checked at the first second."""
