! The next token from logits: the likeliest, or drawn after dividing by a temperature, from a generator of our own
!
! Reference: Park and Miller 1988, the generator x' = 16807 x mod (2**31 - 1); every compiler draws the same.
module septet_sampling
  use, intrinsic :: iso_c_binding, only: c_double, c_float, c_int64_t
  implicit none
  private
  public :: generator, seeded, uniform, next_token

  type :: generator
    integer(c_int64_t) :: state = 1
  end type generator

  integer(c_int64_t), parameter :: modulus = 2147483647_c_int64_t

contains

  pure type(generator) function seeded(seed)
    integer(c_int64_t), intent(in) :: seed
    real(c_double) :: ignored
    integer :: i
    seeded%state = modulo(seed, modulus - 1) + 1
    ! Neighbouring seeds begin close to each other; a few steps part them
    do i = 1, 8
      call uniform(seeded, ignored)
    end do
  end function seeded

  !> A number in 0 .. 1, without the ends
  pure subroutine uniform(g, number)
    type(generator), intent(inout) :: g
    real(c_double), intent(out) :: number
    g%state = mod(16807 * g%state, modulus)
    number = real(g%state, c_double) / real(modulus, c_double)
  end subroutine uniform

  !> Token 0, 1, ...; temperature 0 takes the first of the largest logits
  pure subroutine next_token(logits, temperature, g, token)
    real(c_float), intent(in) :: logits(:)
    real(c_double), intent(in) :: temperature
    type(generator), intent(inout) :: g
    integer, intent(out) :: token
    real(c_double) :: weights(size(logits)), left
    token = maxloc(logits, 1) - 1
    if (temperature <= 0) return
    weights = exp((real(logits, c_double) - maxval(logits)) / temperature)
    call uniform(g, left)
    left = left * sum(weights)
    do token = 0, size(logits) - 2
      left = left - weights(token + 1)
      if (left <= 0) return
    end do
  end subroutine next_token
end module septet_sampling
