! How the stand-alone program ends when something is wrong: what must hold, what came, what to do; status 1
module septet_failure
  use, intrinsic :: iso_c_binding, only: c_int
  use, intrinsic :: iso_fortran_env, only: error_unit, output_unit
  implicit none
  private
  public :: fail, exit_with

  interface
    subroutine c_exit(status) bind(C, name="exit")
      import :: c_int
      integer(c_int), value, intent(in) :: status
    end subroutine c_exit
  end interface

contains

  subroutine fail(requirement, got, hint)
    character(len=*), intent(in) :: requirement, got, hint
    write (error_unit, '(a)') "error: "//requirement//", got "//got
    write (error_unit, '(/, a)') "hint: "//hint
    call exit_with(1)
  end subroutine fail

  !> STOP would print something of its own
  subroutine exit_with(status)
    integer, intent(in) :: status
    flush (output_unit)
    flush (error_unit)
    call c_exit(int(status, c_int))
  end subroutine exit_with
end module septet_failure
