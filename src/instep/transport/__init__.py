"""How bytes get from process to process; nothing is added up here."""
