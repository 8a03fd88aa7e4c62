! The parts of a LLaMA: norm, rotary positions, grouped-query attention, SwiGLU; and the JSON reader behind the configuration
program test_model
  use, intrinsic :: iso_c_binding, only: c_double, c_float, c_int64_t
  use septet_asserting, only: check, finish
  use septet_json, only: element, exists, integer_of, member, real_of, text_of, whole
  use septet_llama, only: attend, normalize, rotary, swiglu
  implicit none

  call test_norm()
  call test_rotary()
  call test_attention()
  call check(abs(swiglu(0.0, 5.0)) <= 0 .and. abs(swiglu(20.0, 3.0) - 60) < 1e-5, "swiglu far from 0 is its gate times up")
  call check(abs(swiglu(1.0, 1.0) - 0.7310586) < 1e-6, "swiglu of ones is the logistic function of 1")
  call check(abs(swiglu(-200.0, 1.0)) <= 0, "swiglu of a very negative gate is 0")
  call test_json()
  call finish()

contains

  subroutine test_norm()
    real(c_float) :: y(4, 1)
    y = normalize(reshape([3.0, -3.0, 3.0, -3.0], [4, 1]), [1.0, 2.0, 3.0, 4.0], 0.0)
    call check(all(abs(y(:, 1) - [1.0, -2.0, 3.0, -4.0]) < 1e-6), "a norm divides by the root mean square, then weighs")
    y = normalize(reshape([0.0, 0.0, 0.0, 0.0], [4, 1]), [1.0, 2.0, 3.0, 4.0], 1e-5)
    call check(all(abs(y) <= 0), "the norm of zeros is zeros")
  end subroutine test_norm

  !> Products of a query and a key depend on how far apart they stand, not on where
  subroutine test_rotary()
    real(c_float) :: q(8, 1, 12), k(8, 1, 12)
    integer :: i
    q = spread(spread([(sin(real(i)), i=1, 8)], 2, 1), 3, 12)
    k = spread(spread([(cos(real(i)), i=1, 8)], 2, 1), 3, 12)
    call rotary(q, 0, 1e4_c_double)
    call rotary(k, 0, 1e4_c_double)
    call check(all(abs(q(:, 1, 1) - [(sin(real(i)), i=1, 8)]) <= 0), "position 0 turns nothing")
    call check(abs(sum(q(:, 1, 5) * k(:, 1, 2)) - sum(q(:, 1, 12) * k(:, 1, 9))) < 1e-5, "only distances matter")
    call check(abs(sum(q(:, 1, 5) * k(:, 1, 2)) - sum(q(:, 1, 5) * k(:, 1, 3))) > 1e-2, "distances do matter")
    k = q
    q(:, :, :1) = spread(spread([(sin(real(i)), i=1, 8)], 2, 1), 3, 1)
    call rotary(q(:, :, :1), 7, 1e4_c_double)
    call check(all(abs(q(:, :, 1) - k(:, :, 8)) <= 0), "a later token goes on where the earlier ones ended")
  end subroutine test_rotary

  subroutine test_attention()
    real(c_float) :: q(2, 4, 1), keys(2, 2, 3), values(2, 2, 3), mixed(2, 4, 1), pair(2, 4, 2)
    keys = 1
    values = reshape([1.0, 1.0, 10.0, 10.0, 2.0, 2.0, 20.0, 20.0, 6.0, 6.0, 60.0, 60.0], [2, 2, 3])
    q = 1
    call attend(q, keys, values, mixed)
    call check(all(abs(mixed(:, 1:2, 1) - 3) < 1e-5), "equal keys give the mean; heads 1 and 2 share the first values")
    call check(all(abs(mixed(:, 3:4, 1) - 30) < 1e-4), "heads 3 and 4 share the second ones")
    keys(:, :, 2) = 100
    call attend(q, keys, values, mixed)
    call check(all(abs(mixed(:, 1:2, 1) - 2) < 1e-5), "a key that fits takes all")
    call attend(reshape([q, q], [2, 4, 2]), keys(:, :, :2), values(:, :, :2), pair)
    call check(all(abs(pair(:, 1:2, 1) - 1) < 1e-5), "a token does not look ahead")
  end subroutine test_attention

  subroutine test_json()
    character(len=*), parameter :: text = '{"a": {"x": "}\"", "n": -12}, "b":[1,[2,3], 4.5e-1 ] , "ab": null}'
    call check(integer_of(text, member(text, member(text, whole(text), "a"), "n"), 0_c_int64_t) == -12, "a nested number")
    call check(text_of(text, member(text, member(text, whole(text), "a"), "x")) == '}\"', "a string with quotes and braces")
    call check(integer_of(text, element(text, element(text, member(text, whole(text), "b"), 2), 2), 0_c_int64_t) == 3, &
               "nested arrays")
    call check(abs(real_of(text, element(text, member(text, whole(text), "b"), 3), 0.0_c_double) - 0.45_c_double) < 1e-12, "a real")
    call check(.not. exists(element(text, member(text, whole(text), "b"), 4)), "no element behind the last")
    call check(.not. exists(member(text, whole(text), "c")) .and. .not. exists(member(text, member(text, whole(text), "b"), "a")), &
               "what is not there")
    call check(integer_of(text, member(text, whole(text), "ab"), 7_c_int64_t) == 7, "null is no number")
    call try_broken(text)
  end subroutine test_json

  !> Every beginning of a text is broken JSON; the reader must come back from all of them
  subroutine try_broken(text)
    character(len=*), intent(in) :: text
    integer :: i, found
    found = 0
    do i = 1, len(text)
      if (exists(member(text(:i), whole(text(:i)), "b"))) found = found + 1
      if (exists(element(text(:i), member(text(:i), whole(text(:i)), "b"), 3))) found = found + 1
    end do
    call check(found <= 2 * len(text), "broken texts end")
  end subroutine try_broken
end program test_model
