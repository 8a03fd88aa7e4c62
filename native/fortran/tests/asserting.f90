! The whole test framework: count what does not hold, say which, and end with status 1 if anything did
module septet_asserting
  use, intrinsic :: iso_fortran_env, only: error_unit
  use septet_failure, only: exit_with
  implicit none
  private
  public :: check, finish

  integer :: failures = 0, checks = 0

contains

  subroutine check(holds, what)
    logical, intent(in) :: holds
    character(len=*), intent(in) :: what
    checks = checks + 1
    if (holds) return
    failures = failures + 1
    write (error_unit, '(a)') "failed: "//what
  end subroutine check

  subroutine finish()
    write (error_unit, '(i0, a, i0, a)') checks - failures, " of ", checks, " checks hold"
    if (failures > 0 .or. checks == 0) call exit_with(1)
  end subroutine finish
end module septet_asserting
