from expertlane.errors import require_extra

require_extra("serve", "serving")
