! A LLaMA forward pass on packed weights: RMSNorm, rotary positions, grouped-query attention with a key-value cache, SwiGLU
!
! x = embedding;  per block  x = x + o(attention(norm(x))),  x = x + down(silu(gate(n)) * up(n)), n = norm(x);  logits = head(norm(x))
! Arrays are features x tokens. Everything but the layers' int8 products is float32.
module septet_llama
  use, intrinsic :: iso_c_binding, only: c_double, c_float, c_int64_t
  use septet_checkpoint, only: apply, checkpoint, matrix, open_checkpoint, read_matrix, read_vector, row_of
  use septet_failure, only: fail
  use septet_json, only: element, exists, integer_of, is_true, member, real_of, span, text_of, whole
  use septet_layers, only: code_int8
  use septet_tensor_file, only: text
  implicit none
  private
  public :: llama, load, forward, is_end, normalize, rotary, attend, swiglu

  type :: block
    type(matrix) :: q, k, v, o, gate, up, down
    real(c_float), allocatable :: attention_norm(:), mlp_norm(:)
    !> What earlier tokens left: head size x key-value heads x positions
    real(c_float), allocatable :: keys(:, :, :), values(:, :, :)
  end type block

  type :: llama
    integer(c_int64_t) :: hidden, intermediate, heads, key_heads, head_size, vocabulary, positions
    real(c_float) :: epsilon
    real(c_double) :: theta
    integer, allocatable :: ends(:)
    type(block), allocatable :: blocks(:)
    type(matrix) :: embedding, head
    real(c_float), allocatable :: norm(:)
  end type llama

contains

  !> Read a checkpoint, and make room for `positions` tokens at most. activations: "int8", "float", or "" for the checkpoint's own
  subroutine load(directory, positions, activations, model)
    character(len=*), intent(in) :: directory, activations
    integer, intent(in) :: positions
    type(llama), intent(out) :: model
    type(checkpoint) :: c
    integer :: i
    call open_checkpoint(directory, c)
    if (activations /= "") c%float_activations = activations == "float"
    call read_config(c%file%config, model)
    model%positions = min(model%positions, int(positions, c_int64_t))
    do i = 1, size(model%blocks)
      call read_block(c, "model.layers."//text(int(i - 1, c_int64_t)), model, model%blocks(i))
    end do
    model%embedding = read_matrix(c, "model.embed_tokens", model%hidden, model%vocabulary)
    if (.not. associated(model%embedding%dense) .and. model%embedding%packed%code /= code_int8) &
      call fail("an embedding must be int8 or dense", "packed", "quantize with another head")
    if (is_true(c%file%config, member(c%file%config, whole(c%file%config), "tie_word_embeddings"))) then
      model%head = model%embedding
    else
      model%head = read_matrix(c, "lm_head", model%hidden, model%vocabulary)
    end if
    model%norm = read_vector(c, "model.norm", model%hidden)
  end subroutine load

  subroutine read_config(config, model)
    character(len=*), intent(in) :: config
    type(llama), intent(inout) :: model
    type(span) :: rope
    integer(c_int64_t) :: blocks
    integer :: i
    if (text_of(config, member(config, whole(config), "model_type")) /= "llama") &
      call fail("model_type must be llama", text_of(config, member(config, whole(config), "model_type")), "use septet run")
    if (text_of(config, member(config, whole(config), "hidden_act")) /= "silu") &
      call fail("hidden_act must be silu", text_of(config, member(config, whole(config), "hidden_act")), "use septet run")
    model%hidden = setting("hidden_size", 1_c_int64_t, 65536_c_int64_t)
    model%intermediate = setting("intermediate_size", 1_c_int64_t, 65536_c_int64_t)
    model%heads = setting("num_attention_heads", 1_c_int64_t, 1024_c_int64_t)
    model%key_heads = setting("num_key_value_heads", 1_c_int64_t, model%heads)
    model%vocabulary = setting("vocab_size", 1_c_int64_t, 2_c_int64_t**24)
    model%positions = setting("max_position_embeddings", 1_c_int64_t, 2_c_int64_t**30)
    blocks = setting("num_hidden_layers", 1_c_int64_t, 1000_c_int64_t)
    model%head_size = integer_of(config, member(config, whole(config), "head_dim"), model%hidden / model%heads)
    if (model%head_size < 2 .or. model%head_size > 1024 .or. mod(model%head_size, 2_c_int64_t) /= 0 .or. &
        mod(model%heads, model%key_heads) /= 0) &
      call fail("heads must be of even size and share keys evenly", text(model%head_size), "this is no LLaMA")
    model%epsilon = real(real_of(config, member(config, whole(config), "rms_norm_eps"), 1e-6_c_double), c_float)
    rope = member(config, whole(config), "rope_parameters")
    if (exists(rope)) then
      if (text_of(config, member(config, rope, "rope_type")) /= "default") &
        call fail("rope_type must be default", text_of(config, member(config, rope, "rope_type")), "use septet run")
      model%theta = real_of(config, member(config, rope, "rope_theta"), 1e4_c_double)
    else
      rope = member(config, whole(config), "rope_scaling")
      if (exists(rope)) then
        if (config(rope%first:rope%last) /= "null") call fail("rope_scaling must be null", "another one", "use septet run")
      end if
      model%theta = real_of(config, member(config, whole(config), "rope_theta"), 1e4_c_double)
    end if
    associate (ends => member(config, whole(config), "eos_token_id"))
      model%ends = [integer ::]
      if (integer_of(config, ends, -1_c_int64_t) >= 0) model%ends = [int(integer_of(config, ends, -1_c_int64_t))]
      do i = 1, 16
        if (exists(element(config, ends, i))) &
          model%ends = [model%ends, int(integer_of(config, element(config, ends, i), -1_c_int64_t))]
      end do
    end associate
    allocate (model%blocks(blocks))

  contains

    integer(c_int64_t) function setting(name, least, most)
      character(len=*), intent(in) :: name
      integer(c_int64_t), intent(in) :: least, most
      setting = integer_of(config, member(config, whole(config), name), -1_c_int64_t)
      if (setting < least .or. setting > most) &
        call fail(name//" must be "//text(least)//" to "//text(most), text(setting), "check config.json")
    end function setting
  end subroutine read_config

  subroutine read_block(c, name, model, b)
    type(checkpoint), intent(in) :: c
    character(len=*), intent(in) :: name
    type(llama), intent(in) :: model
    type(block), intent(out) :: b
    integer(c_int64_t) :: queries, keys
    queries = model%heads * model%head_size
    keys = model%key_heads * model%head_size
    b%q = read_matrix(c, name//".self_attn.q_proj", model%hidden, queries)
    b%k = read_matrix(c, name//".self_attn.k_proj", model%hidden, keys)
    b%v = read_matrix(c, name//".self_attn.v_proj", model%hidden, keys)
    b%o = read_matrix(c, name//".self_attn.o_proj", queries, model%hidden)
    b%gate = read_matrix(c, name//".mlp.gate_proj", model%hidden, model%intermediate)
    b%up = read_matrix(c, name//".mlp.up_proj", model%hidden, model%intermediate)
    b%down = read_matrix(c, name//".mlp.down_proj", model%intermediate, model%hidden)
    b%attention_norm = read_vector(c, name//".input_layernorm", model%hidden)
    b%mlp_norm = read_vector(c, name//".post_attention_layernorm", model%hidden)
    allocate (b%keys(model%head_size, model%key_heads, model%positions), &
              b%values(model%head_size, model%key_heads, model%positions))
  end subroutine read_block

  elemental logical function is_end(model, token)
    type(llama), intent(in) :: model
    integer, intent(in) :: token
    is_end = any(model%ends == token)
  end function is_end

  !> Logits after the last of `tokens`, the first of which stands at position `past` (0, 1, ...)
  subroutine forward(model, tokens, past, logits)
    type(llama), intent(inout) :: model
    integer, intent(in) :: tokens(:), past
    real(c_float), intent(out), contiguous :: logits(:)
    real(c_float), allocatable :: x(:, :), last(:, :)
    integer :: i, t
    if (past + size(tokens) > model%positions) &
      call fail("a text must have at most "//text(model%positions)//" tokens", text(int(past + size(tokens), c_int64_t)), &
                "shorten the prompt")
    if (any(tokens < 0 .or. tokens >= model%vocabulary)) &
      call fail("a token must be below "//text(model%vocabulary), text(int(maxval(tokens), c_int64_t)), "check the tokenizer")
    allocate (x(model%hidden, size(tokens)), last(model%vocabulary, 1))
    do t = 1, size(tokens)
      x(:, t) = row_of(model%embedding, tokens(t))
    end do
    do i = 1, size(model%blocks)
      call run_block(model, model%blocks(i), past, x)
    end do
    call apply(model%head, normalize(x(:, size(tokens):), model%norm, model%epsilon), last)
    logits = last(:, 1)
  end subroutine forward

  subroutine run_block(model, b, past, x)
    type(llama), intent(in) :: model
    type(block), intent(inout) :: b
    integer, intent(in) :: past
    real(c_float), intent(inout), contiguous :: x(:, :)
    real(c_float), allocatable :: normed(:, :), delta(:, :), gate(:, :), up(:, :)
    real(c_float), allocatable :: q(:, :, :), mixed(:, :, :)
    integer :: tokens
    tokens = size(x, 2)
    allocate (delta(model%hidden, tokens), gate(model%intermediate, tokens), up(model%intermediate, tokens), &
              q(model%head_size, model%heads, tokens), mixed(model%head_size, model%heads, tokens))
    normed = normalize(x, b%attention_norm, model%epsilon)
    call apply_heads(b%q, normed, q)
    call apply_heads(b%k, normed, b%keys(:, :, past + 1:past + tokens))
    call apply_heads(b%v, normed, b%values(:, :, past + 1:past + tokens))
    call rotary(q, past, model%theta)
    call rotary(b%keys(:, :, past + 1:past + tokens), past, model%theta)
    call attend(q, b%keys(:, :, :past + tokens), b%values(:, :, :past + tokens), mixed)
    call apply(b%o, reshape(mixed, [size(mixed, 1) * size(mixed, 2), tokens]), delta)
    x = x + delta
    normed = normalize(x, b%mlp_norm, model%epsilon)
    call apply(b%gate, normed, gate)
    call apply(b%up, normed, up)
    call apply(b%down, swiglu(gate, up), delta)
    x = x + delta
  end subroutine run_block

  !> The outputs of a layer, head by head
  subroutine apply_heads(m, x, y)
    type(matrix), intent(in) :: m
    real(c_float), intent(in), contiguous :: x(:, :)
    real(c_float), intent(out) :: y(:, :, :)
    real(c_float), allocatable :: flat(:, :)
    allocate (flat(size(y, 1) * size(y, 2), size(y, 3)))
    call apply(m, x, flat)
    y = reshape(flat, shape(y))
  end subroutine apply_heads

  !> Divide every token by its root mean square, and weigh its features
  pure function normalize(x, weight, epsilon) result(y)
    real(c_float), intent(in) :: x(:, :), weight(:), epsilon
    real(c_float) :: y(size(x, 1), size(x, 2))
    integer :: t
    do concurrent (t = 1:size(x, 2))
      y(:, t) = weight * (x(:, t) / sqrt(sum(x(:, t)**2) / size(x, 1) + epsilon))
    end do
  end function normalize

  !> Turn feature pairs (i, i + half) of every head by an angle that grows with the position
  pure subroutine rotary(x, past, theta)
    real(c_float), intent(inout) :: x(:, :, :)
    integer, intent(in) :: past
    real(c_double), intent(in) :: theta
    real(c_float) :: angle, low, high
    integer :: i, h, t, half
    half = size(x, 1) / 2
    do t = 1, size(x, 3)
      do i = 1, half
        angle = real(past + t - 1, c_float) * (1 / real(theta**(real(i - 1, c_double) / half), c_float))
        do h = 1, size(x, 2)
          low = x(i, h, t)
          high = x(i + half, h, t)
          x(i, h, t) = low * cos(angle) - high * sin(angle)
          x(i + half, h, t) = high * cos(angle) + low * sin(angle)
        end do
      end do
    end do
  end subroutine rotary

  !> Every query head looks at the keys up to its own token; neighbouring query heads share keys and values
  pure subroutine attend(q, keys, values, mixed)
    real(c_float), intent(in) :: q(:, :, :), keys(:, :, :), values(:, :, :)
    real(c_float), intent(out) :: mixed(:, :, :)
    integer :: h, t
    do concurrent (t = 1:size(q, 3), h = 1:size(q, 2))
      associate (seen => size(keys, 3) - size(q, 3) + t, shared => (h - 1) / (size(q, 2) / size(keys, 2)) + 1)
        mixed(:, h, t) = attention_of(q(:, h, t), keys(:, shared, :seen), values(:, shared, :seen))
      end associate
    end do
  end subroutine attend

  pure function attention_of(query, keys, values) result(mixed)
    real(c_float), intent(in) :: query(:), keys(:, :), values(:, :)
    real(c_float) :: mixed(size(query)), weights(size(keys, 2))
    integer :: p
    do p = 1, size(keys, 2)
      weights(p) = dot_product(query, keys(:, p)) / sqrt(real(size(query), c_float))
    end do
    weights = exp(weights - maxval(weights))
    weights = weights / sum(weights)
    mixed = 0
    do p = 1, size(keys, 2)
      mixed = mixed + weights(p) * values(:, p)
    end do
  end function attention_of

  elemental real(c_float) function swiglu(gate, up)
    real(c_float), intent(in) :: gate, up
    swiglu = gate / (1 + exp(-gate)) * up
  end function swiglu
end module septet_llama
