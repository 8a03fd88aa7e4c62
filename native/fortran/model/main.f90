! septet-fortran MODEL "prompt": text from a septet checkpoint of a LLaMA, without Python
program septet_fortran
  use, intrinsic :: iso_c_binding, only: c_double, c_float, c_int64_t
  use, intrinsic :: iso_fortran_env, only: output_unit
  use septet_failure, only: exit_with, fail
  use septet_llama, only: forward, is_end, llama, load
  use septet_sampling, only: generator, next_token, seeded
  use septet_tensor_file, only: text
  use septet_tokenizer, only: encode, piece_of, read_tokenizer, tokenizer
  implicit none

  character(len=*), parameter :: usage = "usage: septet-fortran MODEL PROMPT [--tokens N] [--temperature T] [--seed N]" &
    //" [--activations int8|float] [--tokenizer FILE] [--ids] [--logits FILE]"
  character(len=:), allocatable :: directory, prompt, activations, tokenizer_path, logits_path
  integer :: new_tokens = 128, given = 0
  integer(c_int64_t) :: seed = 0
  real(c_double) :: temperature = 0
  logical :: ids = .false.

  call read_arguments()
  call generate()

contains

  subroutine read_arguments()
    character(len=:), allocatable :: argument
    integer :: i
    activations = ""
    tokenizer_path = ""
    logits_path = ""
    i = 1
    do while (i <= command_argument_count())
      argument = argument_at(i)
      select case (argument)
      case ("--help")
        write (output_unit, '(a)') usage
        call exit_with(0)
      case ("--ids")
        ids = .true.
      case ("--tokens", "--temperature", "--seed", "--activations", "--tokenizer", "--logits")
        if (i == command_argument_count()) call fail(argument//" must have a value", "none", usage)
        i = i + 1
        call read_option(argument, argument_at(i))
      case default
        given = given + 1
        if (given == 1) directory = argument
        if (given == 2) prompt = argument
      end select
      i = i + 1
    end do
    if (given /= 2) call fail("there must be a model and a prompt", text(int(given, c_int64_t))//" arguments", usage)
    if (tokenizer_path == "") tokenizer_path = directory//"/tokenizer.septok"
  end subroutine read_arguments

  subroutine read_option(name, value)
    character(len=*), intent(in) :: name, value
    integer :: status
    status = 0
    select case (name)
    case ("--tokens")
      read (value, *, iostat=status) new_tokens
      if (new_tokens < 0) status = 1
    case ("--temperature")
      read (value, *, iostat=status) temperature
      if (.not. temperature >= 0) status = 1
    case ("--seed")
      read (value, *, iostat=status) seed
    case ("--activations")
      activations = value
      if (value /= "int8" .and. value /= "float") status = 1
    case ("--tokenizer")
      tokenizer_path = value
    case ("--logits")
      logits_path = value
    end select
    if (status /= 0) call fail(name//" must have a possible value", value, usage)
  end subroutine read_option

  function argument_at(index) result(argument)
    integer, intent(in) :: index
    character(len=:), allocatable :: argument
    integer :: length
    call get_command_argument(index, length=length)
    allocate (character(len=length) :: argument)
    call get_command_argument(index, argument(1:length))
  end function argument_at

  subroutine generate()
    type(llama) :: model
    type(tokenizer) :: t
    type(generator) :: g
    integer, allocatable :: tokens(:)
    real(c_float), allocatable :: logits(:)
    integer :: i, past, token
    if (ids) then
      tokens = numbers_of(prompt)
    else
      call read_tokenizer(tokenizer_path, t)
      tokens = encode(t, prompt)
    end if
    if (size(tokens) == 0) call fail("a prompt must have at least one token", "none", "write something")
    call load(directory, size(tokens) + new_tokens, activations, model)
    allocate (logits(model%vocabulary))
    g = seeded(seed)
    call forward(model, tokens, 0, logits)
    if (logits_path /= "") call write_logits(logits)
    past = size(tokens)
    do i = 1, new_tokens
      call next_token(logits, temperature, g, token)
      if (is_end(model, token)) exit
      if (ids) then
        write (output_unit, '(i0)') token
      else
        write (output_unit, '(a)', advance="no") piece_of(t, token)
      end if
      flush (output_unit)
      if (i == new_tokens .or. past == model%positions) exit
      call forward(model, [token], past, logits)
      past = past + 1
    end do
    if (.not. ids) write (output_unit, '(a)') ""
  end subroutine generate

  !> Numbers between commas or blanks
  function numbers_of(list) result(numbers)
    character(len=*), intent(in) :: list
    integer, allocatable :: numbers(:)
    integer :: i, count, status
    count = 0
    do i = 1, len(list)
      if (verify(list(i:i), "0123456789") > 0) cycle
      if (i == 1) then
        count = 1
      else if (verify(list(i - 1:i - 1), "0123456789") > 0) then
        count = count + 1
      end if
    end do
    allocate (numbers(count))
    read (list, *, iostat=status) numbers
    if (status /= 0) call fail("--ids must come with numbers between commas", list, usage)
  end function numbers_of

  subroutine write_logits(logits)
    real(c_float), intent(in) :: logits(:)
    integer :: unit, status
    open (newunit=unit, file=logits_path, access="stream", form="unformatted", action="write", status="replace", iostat=status)
    if (status == 0) write (unit, iostat=status) logits
    if (status /= 0) call fail("--logits must be a file that can be written", logits_path, "choose another place")
    close (unit)
  end subroutine write_logits
end program septet_fortran
