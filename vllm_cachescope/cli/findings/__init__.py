"""What ``explain`` and ``lint`` find: rules, places, quotations, and forms for machines."""
