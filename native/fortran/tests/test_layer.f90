! Whole layers: unit vectors give the dequantized weights, a batch is its tokens, int8 activations stay near float ones
program test_layer
  use, intrinsic :: iso_c_binding, only: c_float, c_int8_t, c_int64_t
  use septet_activations, only: rotate
  use septet_asserting, only: check, finish
  use septet_layers, only: code_int8, code_split, code_trellis, dequantize, layer, linear, padded_inputs, padded_outputs
  implicit none
  integer :: code
  real(c_float) :: x(64), again(64)

  call random_seed(put=spread(1234, 1, 64))
  call random_number(x)
  again = x
  call rotate(again, 32_c_int64_t)
  call check(any(abs(again - x) > 0.1), "rotation changes things")
  call rotate(again, 32_c_int64_t)
  call check(all(abs(again - x) < 1e-6), "rotation undoes itself")
  do code = 0, 2
    call test_code(code, 24_c_int64_t, 80_c_int64_t)
    call test_code(code, 66_c_int64_t, 2_c_int64_t)
  end do
  call finish()

contains

  !> A layer of random bytes, blocks of 8 inputs and 16 outputs where they fit
  function some_layer(code, inputs, outputs) result(l)
    integer, intent(in) :: code
    integer(c_int64_t), intent(in) :: inputs, outputs
    type(layer) :: l
    real(c_float), allocatable :: random(:, :, :)
    l%code = code
    l%inputs = inputs
    l%outputs = outputs
    l%segment = padded_inputs(l)
    if (code == code_int8) then
      allocate (l%weight(inputs, outputs, 1))
    else
      allocate (l%weight(112, padded_inputs(l) / 4, padded_outputs(l) / 64))
    end if
    allocate (random(size(l%weight, 1), size(l%weight, 2), size(l%weight, 3)))
    call random_number(random)
    l%weight = int(256 * random - 128, c_int8_t)
    if (code == code_split) then
      allocate (l%scale(padded_outputs(l), 2), l%offset(padded_outputs(l), 2))
      l%scale = 0.125
      l%offset = -0.5
      return
    end if
    allocate (l%scale(outputs, 1), l%input_scale(inputs))
    l%scale = 0.25
    call random_number(l%input_scale)
    if (mod(inputs, 8_c_int64_t) == 0) l%input_block = 8
    if (mod(outputs, 16_c_int64_t) == 0 .and. code == code_trellis) l%output_block = 16
  end function some_layer

  subroutine test_code(code, inputs, outputs)
    integer, intent(in) :: code
    integer(c_int64_t), intent(in) :: inputs, outputs
    type(layer) :: l
    real(c_float) :: weights(inputs, outputs), units(inputs, inputs), y(outputs, inputs), x(inputs, 5), batch(outputs, 5)
    real(c_float) :: alone(outputs, 1), exact(outputs, 5)
    logical :: failed
    integer :: i
    l = some_layer(code, inputs, outputs)
    call dequantize(l, weights)
    units = 0
    do i = 1, int(inputs)
      units(i, i) = 1
    end do
    call linear(l, units, .true., y, failed)
    call check(.not. failed .and. maxval(abs(y - transpose(weights))) <= 1e-5 * maxval(abs(weights)), &
               "unit vectors give the weights")
    call random_number(x)
    call linear(l, x - 0.5, .false., batch, failed)
    exact = matmul(transpose(weights), x - 0.5)
    call check(maxval(abs(batch - exact)) <= 0.05 * maxval(abs(exact)), "int8 activations stay near float ones")
    do i = 1, 5
      call linear(l, x(:, i:i) - 0.5, .false., alone, failed)
      call check(all(abs(alone(:, 1) - batch(:, i)) <= 0), "a batch is its tokens")
    end do
  end subroutine test_code
end program test_layer
