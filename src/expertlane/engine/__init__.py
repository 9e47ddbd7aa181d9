from expertlane.errors import require_extra

require_extra("engine", "running models")
