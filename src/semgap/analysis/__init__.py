"""From trial directories to tables and figures. Imports nothing of the instrument: it reads what trials wrote."""
