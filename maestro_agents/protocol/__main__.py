"""`python -m maestro_agents.protocol > docs/protocol.schema.json`."""

import sys

from ._schema import schema_text

sys.stdout.write(schema_text())
