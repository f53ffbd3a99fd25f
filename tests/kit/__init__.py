"""What several test files need: small inputs, real servers, the rules of the house. No test lies here."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
