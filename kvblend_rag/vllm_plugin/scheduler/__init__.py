"""The scheduler's side: matching, planning, isolation and reports; it never touches a tensor."""
