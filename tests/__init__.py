# Run all tests from the folder above: python3 -m unittest
