"""septet inside other libraries; each module needs its library and is imported only where that is present."""
