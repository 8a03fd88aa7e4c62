! The generator, greedy choice, and that draws follow the softmax
program test_sampling
  use, intrinsic :: iso_c_binding, only: c_double, c_float
  use septet_asserting, only: check, finish
  use septet_sampling, only: generator, next_token, seeded, uniform
  implicit none
  integer, parameter :: draws = 40000
  real(c_float), parameter :: logits(4) = [1.0, 2.0, 0.5, 2.0]
  type(generator) :: g, h
  real(c_double) :: number, wanted(4)
  integer :: i, token, other, counts(0:3), differences

  do i = 1, 10000
    call uniform(g, number)
  end do
  call check(g%state == 1043618065, "the published value after 10000 steps")
  call next_token(logits, 0.0_c_double, g, token)
  call check(token == 1, "greedy takes the first of the likeliest")
  counts = 0
  g = seeded(int(7, kind(g%state)))
  do i = 1, draws
    call next_token(logits, 0.7_c_double, g, token)
    counts(token) = counts(token) + 1
  end do
  wanted = exp(logits / 0.7_c_double)
  wanted = wanted / sum(wanted)
  ! Four standard deviations of a share
  call check(all(abs(counts / real(draws, c_double) - wanted) < 4 * sqrt(wanted * (1 - wanted) / draws)), &
             "draws follow the softmax")
  g = seeded(int(3, kind(g%state)))
  h = seeded(int(3, kind(g%state)))
  differences = 0
  do i = 1, 100
    call next_token(logits, 1.0_c_double, g, token)
    call next_token(logits, 1.0_c_double, h, other)
    if (token /= other) differences = differences + 1
  end do
  call check(differences == 0, "one seed, one text")
  h = seeded(int(4, kind(g%state)))
  do i = 1, 100
    call next_token(logits, 1.0_c_double, g, token)
    call next_token(logits, 1.0_c_double, h, other)
    if (token /= other) differences = differences + 1
  end do
  call check(differences > 30, "another seed, another text")
  call finish()
end program test_sampling
