"""How far predicted losses can be trusted: curves of loss over coverage, fitted and judged on evaluation records."""
